//! What a training run shows: on a terminal a bar, elsewhere the lines that `mlx_lm.lora` prints.

use std::io::IsTerminal;

use candlewick::train::{Event, Summary, TrainReport};
use indicatif::{ProgressBar, ProgressStyle};

/// Prints events.
pub struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    pub fn new() -> Self {
        let terminal = std::io::stdout().is_terminal() && std::io::stderr().is_terminal();
        Self { bar: terminal.then(ProgressBar::hidden) }
    }

    pub fn event(&mut self, event: &Event) {
        match event {
            Event::Started { step, iters, trainable } => self.start(*step, *iters, *trainable),
            Event::Step { iter, .. } => {
                if let Some(bar) = &self.bar {
                    bar.set_position(*iter as u64);
                }
            }
            Event::Report(report) => self.report(report),
            Event::Validation { iter, evaluation } => self.line(&format!(
                "Iter {iter}: Val loss {:.3}, Val perplexity {:.3}, Val took {:.3}s",
                evaluation.loss,
                evaluation.perplexity(),
                evaluation.seconds
            )),
            Event::AuditPassed { parameters } => {
                self.line(&format!("Gradient audit: all {parameters} trainable tensors learn"));
            }
            Event::Saved { iter, path } => self.line(&format!("Iter {iter}: Saved {}", path.display())),
            _ => {}
        }
    }

    /// One line, above the bar if there is one.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| println!("{text}")),
            None => println!("{text}"),
        }
    }

    fn start(&mut self, step: usize, iters: usize, trainable: usize) {
        let from = if step > 0 { format!(", resumed after iter {step}") } else { String::new() };
        self.line(&format!("Training {} parameters for {iters} iters{from}", grouped(trainable as u64)));
        if let Some(bar) = &mut self.bar {
            *bar = ProgressBar::new(iters as u64).with_position(step as u64);
            let template = "{bar:32.cyan/blue} {pos}/{len}  {msg}  {elapsed} passed, {eta} left";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.reset_eta();
        }
    }

    fn report(&mut self, report: &TrainReport) {
        let TrainReport { iter, loss, learning_rate, iterations_per_second, tokens_per_second, .. } = *report;
        if let Some(bar) = &self.bar {
            bar.set_message(format!("loss {loss:.3}, {tokens_per_second:.0} tokens/s"));
            return;
        }
        println!(
            "Iter {iter}: Train loss {loss:.3}, Learning Rate {}, It/sec {iterations_per_second:.3}, Tokens/sec \
             {tokens_per_second:.3}, Trained Tokens {}, Peak mem {} GB",
            scientific(learning_rate),
            report.trained_tokens,
            gigabytes(report.peak_memory)
        );
    }

    /// Takes the bar away.
    pub fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// The last line.
    pub fn summary(summary: &Summary) {
        let change = match (summary.first_validation, summary.last_validation) {
            (Some(first), Some(last)) if first.to_bits() == last.to_bits() => {
                format!(", val loss {first:.3}")
            }
            (Some(first), Some(last)) => {
                let percent = 100.0 * (last / first - 1.0);
                format!(", val loss {first:.3} -> {last:.3} ({percent:+.1}%)")
            }
            _ => String::new(),
        };
        println!(
            "{} iters, {} tokens, {:.0} tokens/s, peak memory {} GB{change}",
            summary.steps,
            grouped(summary.trained_tokens),
            summary.tokens_per_second,
            gigabytes(summary.peak_memory)
        );
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
fn gigabytes(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "?".to_owned(), |bytes| format!("{:.3}", bytes as f64 / 1e9))
}

/// As Python writes `{:.3e}`: the exponent has a sign and two digits.
fn scientific(value: f64) -> String {
    let text = format!("{value:.3e}");
    match text.split_once('e').and_then(|(digits, exponent)| Some((digits, exponent.parse::<i32>().ok()?))) {
        Some((digits, exponent)) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        None => text,
    }
}

/// 1234567 as 1,234,567.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_look_as_users_know_them() {
        assert_eq!(scientific(1e-5), "1.000e-05");
        assert_eq!(scientific(0.0), "0.000e+00");
        assert_eq!(scientific(2.5e-4), "2.500e-04");
        assert_eq!(scientific(12.0), "1.200e+01");
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(gigabytes(Some(1_234_567_890)), "1.235");
        assert_eq!(gigabytes(None), "?");
    }
}
