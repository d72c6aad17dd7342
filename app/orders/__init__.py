"""Orders after the claim: storing, lists, search, cancelling, dead letters."""
