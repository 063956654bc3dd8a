//! `-c config.yaml`: a file of flags.
//!
//! A file's keys are the flags' names, in `snake_case` or `kebab-case`, and its values are written as on the command
//! line, so there is one parser for both: the file's entries are put before the flags, and the last one counts. A
//! switch is `true` or `false`; what the file switches on, a flag cannot switch off.

use std::ffi::OsString;
use std::path::Path;

use candlewick::{Error, Result};
use clap::{Arg, ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches};
use serde_json::{Map, Value};

/// Parses the command line as clap does, and with it the file that `--config` names. Ends the process where clap
/// does: for `--help`, and for flags that do not parse.
pub fn parse<C: CommandFactory + FromArgMatches>() -> Result<C> {
    let command = C::command().mut_subcommands(|subcommand| subcommand.args_override_self(true));
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let mut matches = command.clone().get_matches_from(&arguments);
    if let Some((name, path)) = config_of(&matches)
        && let Some(subcommand) = command.find_subcommand(name)
    {
        let flags = flags(path, subcommand)?;
        let at = arguments.iter().position(|argument| argument == name).map_or(arguments.len(), |at| at + 1);
        let (before, after) = arguments.split_at(at);
        let all =
            before.iter().cloned().chain(flags.into_iter().map(OsString::from)).chain(after.iter().cloned());
        matches = command.get_matches_from(all);
    }
    C::from_arg_matches(&matches).map_err(|error| Error::Config(error.to_string()))
}

/// The subcommand and its `--config`.
fn config_of(matches: &ArgMatches) -> Option<(&str, &Path)> {
    let (name, matches) = matches.subcommand()?;
    let path = matches.try_get_one::<std::path::PathBuf>("config").ok()??;
    Some((name, path))
}

/// The file's entries as flags of `command`.
fn flags(path: &Path, command: &Command) -> Result<Vec<String>> {
    let fail = |message: String| Error::Config(format!("{}: {message}", path.display()));
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let entries: Map<String, Value> = serde_saphyr::from_str(&text)
        .map_err(|error| fail(format!("not a YAML mapping of flags: {error}")))?;
    let mut flags = Vec::with_capacity(entries.len());
    for (key, value) in &entries {
        let name = key.replace('_', "-");
        let Some(argument) = find(command, &name).filter(|_| name != "config") else {
            return Err(fail(unknown(key, command)));
        };
        match (argument.get_action(), value) {
            (ArgAction::SetTrue, Value::Bool(true)) => flags.push(format!("--{name}")),
            (ArgAction::SetTrue, Value::Bool(false)) | (_, Value::Null) => {}
            (ArgAction::SetTrue, _) => return Err(fail(format!("`{key}` must be true or false"))),
            _ => {
                let value = text_of(value).map_err(|message| fail(format!("`{key}` {message}")))?;
                flags.push(format!("--{name}={value}"));
            }
        }
    }
    // Alone first, so that a wrong value is blamed on the file.
    let command = command.clone().no_binary_name(true);
    command.try_get_matches_from(&flags).map_err(|error| {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default();
        fail(first.trim_start_matches("error: ").to_owned())
    })?;
    Ok(flags)
}

fn find<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    command.get_arguments().find(|argument| {
        argument.get_long() == Some(name)
            || argument.get_all_aliases().is_some_and(|aliases| aliases.contains(&name))
    })
}

/// A value as the command line has it; a list with commas.
fn text_of(value: &Value) -> std::result::Result<String, &'static str> {
    match value {
        Value::Bool(value) => Ok(value.to_string()),
        Value::Number(value) => Ok(value.to_string()),
        Value::String(value) => Ok(value.clone()),
        Value::Array(values) => {
            values.iter().map(text_of).collect::<std::result::Result<Vec<_>, _>>().map(|v| v.join(","))
        }
        Value::Null | Value::Object(_) => Err("must be a plain value or a list of them"),
    }
}

/// What to say about a key that is no flag. Files written for `mlx_lm.lora` have some that are said otherwise here.
fn unknown(key: &str, command: &Command) -> String {
    let advice = match key {
        "lora_parameters" => {
            "write `rank`, `alpha` (mlx's scale times the rank), `dropout` and `target_modules` as keys"
        }
        "lr_schedule" => "write `schedule`, `warmup` and `min_learning_rate` as keys",
        "train" | "test" | "fine_tune_type" => "the subcommand says it: leave the key out",
        _ => "",
    };
    if !advice.is_empty() {
        return format!("unknown key `{key}`: {advice}");
    }
    let name = key.replace('_', "-");
    let near = command.get_arguments().filter_map(Arg::get_long).map(|long| (distance(long, &name), long));
    match near.min() {
        Some((edits, long)) if edits <= 2 => {
            format!("unknown key `{key}`; is it `{}`?", long.replace('-', "_"))
        }
        _ => format!("unknown key `{key}`; the keys are the flags of `wick {} --help`", command.get_name()),
    }
}

/// Edits between two words (Levenshtein), with one row of the table.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in (1..).zip(a.chars()) {
        let mut diagonal = std::mem::replace(row.first_mut().unwrap_or(&mut 0), i);
        let mut left = i;
        for (cell, y) in row.iter_mut().skip(1).zip(&b) {
            let best = (diagonal + usize::from(x != *y)).min(*cell + 1).min(left + 1);
            diagonal = std::mem::replace(cell, best);
            left = best;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use clap::Args;

    use super::*;

    fn of(yaml: &str) -> std::result::Result<Vec<String>, String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(yaml.as_bytes()).unwrap();
        let command = crate::train::Options::augment_args(Command::new("train"));
        flags(file.path(), &command).map_err(|error| {
            error.to_string().strip_prefix(&format!("{}: ", file.path().display())).unwrap().to_owned()
        })
    }

    #[test]
    fn keys_in_either_spelling_become_flags() {
        let yaml = "batch_size: 2\nlearning-rate: 1e-5\nmask_prompt: true\ntruncate: false\nval_batches: -1\nconstant: \n";
        let yaml =
            yaml.replace("constant: \n", "target_modules: [q_proj, v_proj]\ndata: \"my data\"\nseed:\n");
        let flags = of(&yaml).unwrap();
        assert_eq!(flags.len(), 6);
        assert_eq!(flags[0], "--batch-size=2");
        assert_eq!(flags[1].strip_prefix("--learning-rate=").unwrap().parse(), Ok(1e-5));
        assert_eq!(
            flags[2..],
            ["--mask-prompt", "--val-batches=-1", "--target-modules=q_proj,v_proj", "--data=my data"]
        );
    }

    #[test]
    fn what_is_no_flag_is_named() {
        assert_eq!(of("batch_sise: 2").unwrap_err(), "unknown key `batch_sise`; is it `batch_size`?");
        assert_eq!(
            of("quantize: 4").unwrap_err(),
            "unknown key `quantize`; the keys are the flags of `wick train --help`"
        );
        assert!(
            of("lora_parameters: {rank: 8}")
                .unwrap_err()
                .starts_with("unknown key `lora_parameters`: write `rank`")
        );
        assert_eq!(of("data: {train: x}").unwrap_err(), "`data` must be a plain value or a list of them");
        assert_eq!(of("truncate: 1").unwrap_err(), "`truncate` must be true or false");
        assert!(of("config: other.yaml").unwrap_err().starts_with("unknown key `config`"));
        let wrong = of("batch_size: four").unwrap_err();
        assert!(wrong.starts_with("invalid value 'four' for '--batch-size"), "{wrong}");
        assert!(of("- a\n- b").unwrap_err().starts_with("not a YAML mapping of flags"));
    }

    #[test]
    fn distances() {
        for (a, b, edits) in
            [("", "", 0), ("", "abc", 3), ("iters", "iter", 1), ("seed", "sede", 2), ("a", "b", 1)]
        {
            assert_eq!(distance(a, b), edits);
            assert_eq!(distance(b, a), edits);
        }
    }
}
