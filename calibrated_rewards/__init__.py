"""InfAlign-CTRL: calibrated, transformed rewards."""
