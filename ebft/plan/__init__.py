"""What a run would need, before anything is loaded; and the settings that fit a budget."""
