"""The feed of what happened, and webhooks, which send it: numbered by one, read by everybody."""
