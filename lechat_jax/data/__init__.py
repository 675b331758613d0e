"""What is learned from: files, then text, then tokens, then batches of rows."""
