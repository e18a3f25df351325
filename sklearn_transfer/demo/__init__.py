"""The main job on data that comes with installed packages; see ``__main__``.

    data.py    photographs, digits and docstrings as rows and labels
    tasks.py   the four jobs, each an ordinary scikit-learn search
    report.py  the table and the picture

The arrows point up this list.
"""
