"""What an API request wants: orders, and how they are drawn, checked and encoded."""
