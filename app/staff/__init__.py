"""Who may sign in, who is signed in, and the tokens of programs."""
