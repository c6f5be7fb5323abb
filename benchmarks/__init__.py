"""Speed measurements. They import the package; the package never imports them."""
