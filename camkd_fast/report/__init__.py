"""Building blocks of reports: `plots` draws SVG, `page` writes one HTML file. Independent of training."""
