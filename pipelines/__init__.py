"""KFP pipelines, and their compiled YAML under ``compiled/``."""
