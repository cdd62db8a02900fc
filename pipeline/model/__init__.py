"""The model: which layers a stage owns, the stage itself, its weights, its adapters, its activation memory."""
