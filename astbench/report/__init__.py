"""One page of HTML from records: leaderboard, frontier, costs, tables, runs, and what an attention chose."""
