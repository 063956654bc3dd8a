//! An SVG for each operation: every engine's time in units of ours.

use plotters::prelude::*;

use crate::protocol::Way;
use crate::report::{BASELINE, CaseReport, Report};
use crate::{Error, Result};

const WIDTH: u32 = 960;
const ROW: u32 = 22;
const GREY: RGBColor = RGBColor(0x55, 0x55, 0x55);
const OURS: RGBColor = RGBColor(0xd6, 0x5f, 0x1e);
const COLOURS: [RGBColor; 8] = [
    RGBColor(0x1f, 0x77, 0xb4),
    RGBColor(0x2c, 0xa0, 0x2c),
    RGBColor(0x94, 0x67, 0xbd),
    RGBColor(0x8c, 0x56, 0x4b),
    RGBColor(0xe3, 0x77, 0xc2),
    RGBColor(0x7f, 0x7f, 0x7f),
    RGBColor(0xbc, 0xbd, 0x22),
    RGBColor(0x17, 0xbe, 0xcf),
];

/// The charts by name of their operation.
pub fn by_op(report: &Report) -> Result<Vec<(String, String)>> {
    let labels: Vec<String> = report.labels().into_iter().filter(|label| label != BASELINE).collect();
    let mut charts = Vec::new();
    let mut cases: &[CaseReport] = &report.cases;
    while let Some(first) = cases.first() {
        let op = first.case.op;
        let end = cases.iter().position(|case| case.case.op != op).unwrap_or(cases.len());
        let (own, rest) = cases.split_at(end);
        let points = points(own, &labels);
        if !points.is_empty() {
            let mut svg = String::new();
            draw(&mut svg, op.name(), own, &labels, &points)
                .map_err(|e| Error::Engine(format!("the chart of {}: {e}", op.name())))?;
            charts.push((op.name().to_owned(), svg));
        }
        cases = rest;
    }
    Ok(charts)
}

/// Row, engine, and its time over ours: GPU time where both have it, else pipelined, else synced.
fn points(cases: &[CaseReport], labels: &[String]) -> Vec<(usize, usize, f64)> {
    let mut points = Vec::new();
    for (row, case) in cases.iter().enumerate() {
        for (engine, label) in labels.iter().enumerate() {
            let ratio = [Way::Graph, Way::Pipelined, Way::Synced]
                .into_iter()
                .find_map(|way| case.outcome(label, way).and_then(|outcome| outcome.ratio));
            if let Some(ratio) = ratio.filter(|ratio| *ratio > 0.0 && ratio.is_finite()) {
                points.push((row, engine, ratio.recip()));
            }
        }
    }
    points
}

fn draw(
    svg: &mut String,
    title: &str,
    cases: &[CaseReport],
    labels: &[String],
    points: &[(usize, usize, f64)],
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let rows = u32::try_from(cases.len())?;
    let low = points.iter().map(|point| point.2).fold(0.5, f64::min) / 1.3;
    let high = points.iter().map(|point| point.2).fold(2.0, f64::max) * 1.3;
    let height = |row: usize| f64::from(rows) - 0.5 - crate::ops::as_f64(row);

    let area = SVGBackend::with_string(svg, (WIDTH, ROW * rows + 150)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20).into_font().color(&GREY))
        .margin(14)
        .margin_right(24)
        .x_label_area_size(44)
        .y_label_area_size(250)
        .build_cartesian_2d((low..high).log_scale(), 0.0..f64::from(rows))?;
    let names: Vec<String> =
        cases.iter().map(|case| case.id.trim_start_matches(title).trim().to_owned()).collect();
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .bold_line_style(BLACK.mix(0.12))
        .light_line_style(TRANSPARENT)
        .axis_style(GREY)
        .label_style(("sans-serif", 13).into_font().color(&GREY))
        .axis_desc_style(("sans-serif", 14).into_font().color(&GREY))
        .x_desc("time, in units of candlewick's (right: slower than candlewick)")
        .x_label_formatter(&|x| if *x < 10.0 { format!("{x:.1}") } else { format!("{x:.0}") })
        .draw()?;
    let style = ("sans-serif", 13).into_font().color(&GREY);
    let plot = chart.plotting_area();
    for (row, name) in names.iter().enumerate() {
        let (_, y) = plot.map_coordinate(&(1.0, height(row)));
        area.draw(&Text::new(name.clone(), (18, y - 6), style.clone()))?;
    }
    chart.draw_series(std::iter::once(PathElement::new(
        vec![(1.0, 0.0), (1.0, f64::from(rows))],
        OURS.stroke_width(2),
    )))?;
    for (engine, label) in labels.iter().enumerate() {
        let own = points.iter().filter(|point| point.1 == engine);
        let mut own = own.map(|point| (point.2, height(point.0))).peekable();
        if own.peek().is_none() {
            continue;
        }
        let colour = COLOURS[engine % COLOURS.len()];
        chart
            .draw_series(own.map(|at| Circle::new(at, 4, colour.filled())))?
            .label(label.clone())
            .legend(move |(x, y)| Circle::new((x + 8, y), 4, colour.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.85))
        .label_font(("sans-serif", 13).into_font().color(&GREY))
        .draw()?;
    area.present()?;
    drop(chart);
    drop(area);
    Ok(())
}
