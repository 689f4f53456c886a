"""Tables, charts and pages that both families of recipes share."""
