"""What experts respond to: a labelled corpus through the model, and a report of which experts fire on what."""
