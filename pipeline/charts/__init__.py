"""Charts and pages for reports: SVG and HTML as text, without libraries, scripts or files beside them. Knows nobody."""
