"""Pictures as SVG that needs nothing else: axes and elements (axes.py), the page around them in light and dark (page.py)."""
