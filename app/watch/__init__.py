"""The sale as people and Prometheus watch it: figures, meters, health."""
