"""What merging two real pretrained towers costs, by method: evidence for docs/gauge.md."""
