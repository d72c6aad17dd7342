"""What is sold: terms of sale, restocks, and every movement of stock."""
