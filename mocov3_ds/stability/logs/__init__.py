"""What did another program log? Its tables of numbers, and which of them mean what."""
