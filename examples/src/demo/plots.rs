//! The demo's plots, as SVG: reward over policy versions, and bytes per update beside a full snapshot.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kuva::backend::svg::SvgBackend;
use kuva::plot::LinePlot;
use kuva::render::layout::Layout;
use kuva::render::plots::Plot;
use kuva::render::render::render_multiple;

/// One series of a plot.
#[derive(Debug, Clone)]
pub struct Series<'a> {
    /// Name in the legend.
    pub name: &'a str,
    /// Colour as hexadecimal.
    pub color: &'a str,
    /// Points (x, y).
    pub points: Vec<(f64, f64)>,
}

/// Writes one line plot to `path`.
///
/// # Errors
/// When the file cannot be written.
pub fn line_plot(
    path: &Path,
    title: &str,
    x_label: &str,
    y_label: &str,
    series: &[Series<'_>],
) -> Result<PathBuf> {
    let plots: Vec<Plot> = series
        .iter()
        .filter(|s| !s.points.is_empty())
        .map(|s| {
            let line = LinePlot::new().with_data(s.points.clone()).with_color(s.color).with_stroke_width(2.0);
            Plot::Line(line.with_legend(s.name))
        })
        .collect();
    let layout =
        Layout::auto_from_plots(&plots).with_title(title).with_x_label(x_label).with_y_label(y_label);
    let svg = SvgBackend.render_scene(&render_multiple(plots, layout));
    std::fs::write(path, svg).with_context(|| format!("writing the plot {}", path.display()))?;
    Ok(path.to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_are_svg_with_their_title_and_every_series() {
        let dir = tempfile::tempdir().unwrap();
        let series = [
            Series { name: "train", color: "#1f77b4", points: vec![(0.0, 0.2), (1.0, 0.5)] },
            Series { name: "held out", color: "#d62728", points: vec![(0.0, 0.25), (1.0, 0.55)] },
        ];
        let path = line_plot(&dir.path().join("p.svg"), "Reward", "version", "share", &series).unwrap();
        let svg = std::fs::read_to_string(path).unwrap();
        for text in ["<svg", "Reward", "held out", "#1f77b4", "#d62728"] {
            assert!(svg.contains(text), "{text}");
        }
    }
}
