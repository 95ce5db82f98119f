"""Where an engine's orders and block lists come from: one file per way of deciding."""
