"""report.html: one file a person opens to see how a night's model did. `data` gathers, `page` draws."""
