"""Routes, forms and pages: the HTTP side of the images API."""
