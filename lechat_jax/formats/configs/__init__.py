"""A model's shape in the words of each format: config.json and params.json, both ways."""
