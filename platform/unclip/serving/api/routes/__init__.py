"""The routes of the API: what is read and answered; `Service` does the work."""
