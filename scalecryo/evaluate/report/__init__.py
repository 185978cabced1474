"""What a run's report is made of, by what is drawn: curves, slices, particles, views, the surface; and the page."""

from scalecryo.evaluate.report.curves import fsc_figure, training_figure
from scalecryo.evaluate.report.page import Section, paragraphs_html, report_html, table_html, viewer_html, with_sections
from scalecryo.evaluate.report.particles import confidence_figure, particles_figure, projections_figure
from scalecryo.evaluate.report.slices import slices_figure
from scalecryo.evaluate.report.surface import Surface, surface_picture
from scalecryo.evaluate.report.views import cones_figure, orientation_figure

__all__ = [
    "Section",
    "Surface",
    "cones_figure",
    "confidence_figure",
    "fsc_figure",
    "orientation_figure",
    "paragraphs_html",
    "particles_figure",
    "projections_figure",
    "report_html",
    "slices_figure",
    "surface_picture",
    "table_html",
    "training_figure",
    "viewer_html",
    "with_sections",
]
