export PATH="/opt/venv/bin:$PATH"
