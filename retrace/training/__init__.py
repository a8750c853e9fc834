"""What trains models. No node imports it."""
