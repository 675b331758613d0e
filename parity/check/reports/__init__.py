"""What the check found, in text, JSON, JUnit, Markdown and HTML."""
