//! `loss.svg`: the loss curves.

#![expect(clippy::cast_precision_loss, reason = "step numbers on an axis")]

use candlewick::{Error, Result};
use plotters::prelude::*;

use crate::metrics::Record;

const SIZE: (u32, u32) = (900, 540);
const TRAIN: RGBColor = RGBColor(0x1f, 0x77, 0xb4);
const VALIDATION: RGBColor = RGBColor(0xd6, 0x5f, 0x1e);
const GREY: RGBColor = RGBColor(0x55, 0x55, 0x55);

/// Draws the records; `None` while there are fewer than two points to join.
pub fn loss(records: &[Record]) -> Result<Option<String>> {
    let mut train = Vec::new();
    let mut validation = Vec::new();
    for record in records {
        match *record {
            Record::Train { iter, train_loss, .. } => train.push((iter as f64, train_loss)),
            Record::Validation { iter, val_loss, .. } => validation.push((iter as f64, val_loss)),
        }
    }
    if train.len() < 2 && validation.len() < 2 {
        return Ok(None);
    }
    let mut svg = String::new();
    draw(&mut svg, &train, &validation)
        .map_err(|error| Error::Config(format!("cannot draw loss.svg: {error}")))?;
    Ok(Some(svg))
}

fn draw(
    svg: &mut String,
    train: &[(f64, f64)],
    validation: &[(f64, f64)],
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let points = || train.iter().chain(validation).filter(|(_, loss)| loss.is_finite());
    let low = points().map(|point| point.1).fold(f64::INFINITY, f64::min);
    let high = points().map(|point| point.1).fold(f64::NEG_INFINITY, f64::max);
    let margin = (0.06 * (high - low)).max(0.01);
    let last = points().map(|point| point.0).fold(1.0, f64::max);

    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(20)
        .margin_right(30)
        .x_label_area_size(50)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..last * 1.01, (low - margin).max(0.0)..high + margin)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(BLACK.mix(0.1))
        .light_line_style(TRANSPARENT)
        .axis_style(GREY)
        .label_style(("sans-serif", 14).into_font().color(&GREY))
        .axis_desc_style(("sans-serif", 16).into_font().color(&GREY))
        .x_desc("optimizer step")
        .y_desc("loss per token (nats)")
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&|loss| format!("{loss:.2}"))
        .draw()?;
    if !train.is_empty() {
        chart
            .draw_series(LineSeries::new(train.iter().copied(), TRAIN.stroke_width(2)))?
            .label("training")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 22, y)], TRAIN.stroke_width(2)));
    }
    if !validation.is_empty() {
        chart
            .draw_series(LineSeries::new(validation.iter().copied(), VALIDATION.stroke_width(2)))?
            .label("validation")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 22, y)], VALIDATION.stroke_width(2)));
        chart.draw_series(validation.iter().map(|&point| Circle::new(point, 4, VALIDATION.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(14)
        .background_style(WHITE.mix(0.8))
        .label_font(("sans-serif", 16).into_font().color(&GREY))
        .draw()?;
    area.present()?;
    drop(chart);
    drop(area);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn validation(iter: usize, val_loss: f64) -> Record {
        Record::Validation { iter, val_loss, val_perplexity: val_loss.exp(), val_tokens: 1, val_seconds: 0.0 }
    }

    #[test]
    fn curves_are_drawn_when_there_is_something_to_join() {
        assert_eq!(loss(&[validation(0, 3.0)]).unwrap(), None);
        let svg =
            loss(&[validation(0, 3.0), validation(10, 2.0), validation(20, f64::NAN)]).unwrap().unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert!(
            svg.contains("loss per token (nats)")
                && svg.contains("optimizer step")
                && svg.contains("validation")
        );
        // A flat curve has an axis, too.
        assert!(loss(&[validation(0, 3.0), validation(10, 3.0)]).unwrap().is_some());
    }
}
