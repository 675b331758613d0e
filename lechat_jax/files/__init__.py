"""Files: written completely or not at all, checked, locked, found, read whatever their encoding."""
