"""KFP components: one folder per step, each 3 to 8 lines round one function of ``hjepa.steps``."""
