//! Reading JSON lines into rows.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{Error, Result};

/// What the rows of a file look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RowFormat {
    /// `{"text": "…"}`
    Text,
    /// `{"prompt": "…", "completion": "…"}`
    Completion,
}

impl RowFormat {
    /// Tells the format from the keys of a file's first row.
    fn of(object: &Map<String, Value>) -> std::result::Result<Self, String> {
        let has = |key| object.contains_key(key);
        if has("text") {
            Ok(Self::Text)
        } else if has("prompt") && has("completion") {
            Ok(Self::Completion)
        } else if has("messages") || has("conversations") {
            Err("chat rows are not supported yet; use `text`, or `prompt` and `completion`".to_owned())
        } else {
            let keys: Vec<_> = object.keys().map(|key| format!("`{key}`")).collect();
            let keys = if keys.is_empty() { "nothing".to_owned() } else { keys.join(", ") };
            Err(format!("a row has `text`, or `prompt` and `completion`; this one has {keys}"))
        }
    }
}

/// One row's text.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RowContent {
    /// Plain text: every token is learned.
    Text(String),
    /// A prompt and what should follow it. Nothing is put between the two.
    Completion {
        /// What is given.
        prompt: String,
        /// What is to be learned.
        completion: String,
    },
}

/// One row and where it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its line, counted from one.
    pub line: usize,
    /// Its text.
    pub content: RowContent,
}

/// All rows of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    /// The file, for messages.
    pub path: PathBuf,
    /// What the rows look like.
    pub format: RowFormat,
    /// The rows in the file's order; at least one.
    pub rows: Vec<Row>,
}

impl Rows {
    /// Reads a file. Blank lines are skipped.
    ///
    /// Fails on a line that is not a JSON object of the first row's format, naming the line, and on a file without
    /// any row.
    pub fn read(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        Self::from_reader(path, BufReader::new(file))
    }

    /// Reads the file if there is one.
    pub fn read_optional(path: &Path) -> Result<Option<Self>> {
        if path.try_exists().map_err(Error::io(path))? { Self::read(path).map(Some) } else { Ok(None) }
    }

    /// Reads rows from anywhere; `path` is the name that messages use.
    pub fn from_reader(path: &Path, mut reader: impl BufRead) -> Result<Self> {
        let mut format = None;
        let mut rows = Vec::new();
        let mut bytes = Vec::new();
        let mut line = 0;
        loop {
            bytes.clear();
            if reader.read_until(b'\n', &mut bytes).map_err(Error::io(path))? == 0 {
                break;
            }
            line += 1;
            if bytes.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let content = parse(&bytes, &mut format).map_err(|message| data_error(path, line, message))?;
            rows.push(Row { line, content });
        }
        let Some(format) = format else {
            return Err(data_error(path, line.max(1), "the file has no rows".to_owned()));
        };
        Ok(Self { path: path.to_path_buf(), format, rows })
    }
}

pub(super) fn data_error(path: &Path, line: usize, message: String) -> Error {
    Error::Data { path: path.to_path_buf(), line, message }
}

/// Parses one line; the first call settles `format`.
fn parse(bytes: &[u8], format: &mut Option<RowFormat>) -> std::result::Result<RowContent, String> {
    // A byte order mark is what some editors put before the first line.
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut object = match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => object,
        Ok(other) => return Err(format!("expected a JSON object, got {}", kind(&other))),
        Err(error) => return Err(format!("not valid JSON: {}", without_position(&error))),
    };
    let expected = match *format {
        Some(format) => format,
        None => *format.insert(RowFormat::of(&object)?),
    };
    match expected {
        RowFormat::Text => Ok(RowContent::Text(take(&mut object, "text")?)),
        RowFormat::Completion => Ok(RowContent::Completion {
            prompt: take(&mut object, "prompt")?,
            completion: take(&mut object, "completion")?,
        }),
    }
}

fn take(object: &mut Map<String, Value>, key: &str) -> std::result::Result<String, String> {
    match object.remove(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("`{key}` must be a string, got {}", kind(&other))),
        None => Err(format!("the first row has `{key}`, this one has not")),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// `serde_json` says "… at line 1 column 7"; the line is always 1 here and the reader is told the real one.
fn without_position(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let end = text.rfind(" at line ").unwrap_or(text.len());
    format!("{} (column {})", text.get(..end).unwrap_or(&text), error.column())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Rows> {
        Rows::from_reader(Path::new("train.jsonl"), text.as_bytes())
    }

    fn message(text: &str) -> String {
        read(text).unwrap_err().to_string()
    }

    #[test]
    fn the_first_row_tells_the_format() {
        let rows = read("\u{feff}{\"text\":\"a\"}\n\n  \n{\"text\":\"b\",\"source\":3}\r\n").unwrap();
        assert_eq!(rows.format, RowFormat::Text);
        assert_eq!(rows.rows.iter().map(|row| row.line).collect::<Vec<_>>(), [1, 4]);
        assert_eq!(rows.rows[1].content, RowContent::Text("b".to_owned()));

        let rows = read("{\"completion\":\"4\",\"prompt\":\"2+2=\"}").unwrap();
        assert_eq!(rows.format, RowFormat::Completion);
        let expected = RowContent::Completion { prompt: "2+2=".to_owned(), completion: "4".to_owned() };
        assert_eq!(rows.rows[0].content, expected);
    }

    #[test]
    fn bad_rows_are_named_by_line() {
        let cases = [
            ("", "train.jsonl:1: the file has no rows"),
            ("\n\n", "train.jsonl:2: the file has no rows"),
            ("{\"text\":\"a\"}\n{\"text\":5}", "train.jsonl:2: `text` must be a string, got a number"),
            ("{\"text\":\"a\"}\n\n{\"text\":null}", "train.jsonl:3: `text` must be a string, got null"),
            (
                "{\"text\":\"a\"}\n{\"prompt\":\"p\",\"completion\":\"c\"}",
                "train.jsonl:2: the first row has `text`, this one has not",
            ),
            (
                "{\"prompt\":\"p\",\"completion\":\"c\"}\n{\"prompt\":\"p\"}",
                "train.jsonl:2: the first row has `completion`, this one has not",
            ),
            ("[1]", "train.jsonl:1: expected a JSON object, got an array"),
            (
                "{\"txt\":\"a\"}",
                "train.jsonl:1: a row has `text`, or `prompt` and `completion`; this one has `txt`",
            ),
            ("{}", "train.jsonl:1: a row has `text`, or `prompt` and `completion`; this one has nothing"),
            (
                "{\"messages\":[]}",
                "train.jsonl:1: chat rows are not supported yet; use `text`, or `prompt` and `completion`",
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(message(text), expected);
        }
        assert!(
            message("{\"text\":\"a\"}\n{\"text\":")
                .starts_with("train.jsonl:2: not valid JSON: EOF while parsing")
        );
        assert!(
            message("{\"text\":\"a\"} {}").contains("train.jsonl:1: not valid JSON: trailing characters")
        );
        let invalid = Rows::from_reader(Path::new("t"), &b"{\"text\":\"\xff\"}"[..]).unwrap_err();
        assert!(invalid.to_string().starts_with("t:1: not valid JSON: invalid unicode"), "{invalid}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let path = Path::new("no-such-folder/train.jsonl");
        assert!(Rows::read(path).unwrap_err().to_string().starts_with("no-such-folder/train.jsonl: "));
        assert!(Rows::read_optional(path).unwrap().is_none());
    }
}
