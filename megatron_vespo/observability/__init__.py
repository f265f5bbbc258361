"""What a person sees of a run: metrics on disk, a display while it trains, a report when it is done."""
