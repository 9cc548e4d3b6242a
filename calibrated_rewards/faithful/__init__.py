"""Settings under which a trainer maximises E[reward] - beta KL, framework by framework."""
