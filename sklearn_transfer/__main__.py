"""``python -m sklearn_transfer`` prints what a bug report needs."""

from sklearn_transfer._show_versions import show_versions

if __name__ == "__main__":
    show_versions()
