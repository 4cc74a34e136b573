//! Plots of a run, as SVG.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kuva::backend::svg::SvgBackend;
use kuva::plot::{BarPlot, LinePlot};
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
    draw(path, plots, [title, x_label, y_label])
}

/// Writes one plot of counts to `path`: how often 0, 1, 2 and so on.
///
/// # Errors
/// When the file cannot be written.
pub fn histogram(path: &Path, title: &str, x_label: &str, y_label: &str, counts: &[u64]) -> Result<PathBuf> {
    let bars = counts.iter().enumerate().map(|(value, n)| (value.to_string(), *n as f64));
    let bars = BarPlot::new().with_bars(bars).with_color("#3b5b92");
    draw(path, vec![Plot::Bar(bars)], [title, x_label, y_label])
}

fn draw(path: &Path, plots: Vec<Plot>, [title, x_label, y_label]: [&str; 3]) -> Result<PathBuf> {
    let layout =
        Layout::auto_from_plots(&plots).with_title(title).with_x_label(x_label).with_y_label(y_label);
    let scene = render_multiple(plots, layout);
    // Without it a page that shows the plot smaller shows a corner of it.
    let scalable = format!("<svg viewBox=\"0 0 {} {}\" ", scene.width, scene.height);
    let svg = SvgBackend.render_scene(&scene).replacen("<svg ", &scalable, 1);
    std::fs::write(path, svg).with_context(|| format!("writing the plot {}", path.display()))?;
    Ok(path.to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_has_a_bar_for_every_value() {
        let dir = tempfile::tempdir().unwrap();
        let path = histogram(&dir.path().join("h.svg"), "Age", "versions", "rollouts", &[5, 0, 9]).unwrap();
        let svg = std::fs::read_to_string(path).unwrap();
        for text in ["Age", "versions", "rollouts", ">0<", ">1<", ">2<", "#3b5b92", "<svg viewBox=\"0 0 "] {
            assert!(svg.contains(text), "{text}");
        }
    }

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
