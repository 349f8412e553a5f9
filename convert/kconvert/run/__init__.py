"""Between the Hub and the disk while a plan runs: what must come, who gets room on the disk, what leaves it when."""
