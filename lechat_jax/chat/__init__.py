"""Interactive chat with a model, by Mistral's chat templates."""
