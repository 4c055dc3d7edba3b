"""Metrics, bootstrap intervals, gates and SHAP contributions of a tested model."""
