"""Translation: WMT14 English-German and other pairs."""
