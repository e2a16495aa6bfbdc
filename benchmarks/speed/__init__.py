"""The project's benchmarks: ratios measured in one run. ``make bench`` runs them; nothing here ships."""
