"""What a profile is and says, and how it is planned with. Without torch."""
