"""Reports: `plots` draws numbers, `page` puts plots and tables into one HTML file. Neither knows of training."""
