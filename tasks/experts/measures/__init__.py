"""What models of kind experts are asked, and how the answers are scored."""
