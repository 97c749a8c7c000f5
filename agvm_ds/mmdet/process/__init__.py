"""What a rank is to the system: its command line, its end, signals, and the files that it leaves."""
