//! A running engine, as the runner sees it.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::case::DeviceName;
use crate::protocol::{Hello, Reply, Request};
use crate::{Error, Result};

/// How to start an engine.
#[derive(Debug, Clone)]
pub struct Start {
    pub name: String,
    pub program: PathBuf,
    pub arguments: Vec<String>,
    pub environment: Vec<(String, String)>,
}

/// One engine's process and what it said of itself.
pub struct Session {
    pub hello: Hello,
    writer: Option<Box<dyn Write + Send>>,
    reader: Box<dyn BufRead + Send>,
    child: Option<Child>,
}

impl Session {
    /// Starts the program.
    pub fn start(start: &Start, device: DeviceName, threads: usize) -> Result<Self> {
        let mut child = Command::new(&start.program)
            .args(&start.arguments)
            .envs(start.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|e| Error::at(&start.program, e))?;
        let (Some(writer), Some(reader)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::Engine(format!("{}: no pipes", start.name)));
        };
        Self::talk(Box::new(writer), Box::new(BufReader::new(reader)), Some(child), device, threads)
            .map_err(|e| Error::Engine(format!("{} with {}: {e}", start.name, start.program.display())))
    }

    /// Greets an engine at the other end of two streams.
    pub fn talk(
        writer: Box<dyn Write + Send>,
        reader: Box<dyn BufRead + Send>,
        child: Option<Child>,
        device: DeviceName,
        threads: usize,
    ) -> Result<Self> {
        let mut session = Self { hello: Hello::default(), writer: Some(writer), reader, child };
        match session.ask(&Request::Hello { device, threads })?.0 {
            Reply::Hello(hello) => session.hello = hello,
            other => return Err(session.unexpected("hello", &other)),
        }
        Ok(session)
    }

    /// The engine's answer, and how long it took by this program's clock.
    pub fn ask(&mut self, request: &Request) -> Result<(Reply, Duration)> {
        let request = serde_json::to_string(request).map_err(|e| Error::Engine(e.to_string()))?;
        let writer = self.writer.as_mut().ok_or_else(|| Error::Engine("the engine was closed".to_owned()))?;
        let start = Instant::now();
        writeln!(writer, "{request}").and_then(|()| writer.flush()).map_err(Error::stream)?;
        let mut line = String::new();
        self.reader.read_line(&mut line).map_err(Error::stream)?;
        let wall = start.elapsed();
        if line.is_empty() {
            return Err(Error::Engine(format!("the engine {} ended", self.hello.engine)));
        }
        match serde_json::from_str(&line)
            .map_err(|e| Error::Engine(format!("{}: {e}: {line}", self.hello.engine)))?
        {
            Reply::Failed { reason } => Err(Error::Engine(reason)),
            reply => Ok((reply, wall)),
        }
    }

    /// As [`Session::ask`], for what has no answer but that it is done.
    pub fn tell(&mut self, request: &Request) -> Result<Duration> {
        match self.ask(request)? {
            (Reply::Done, wall) => Ok(wall),
            (Reply::Unsupported { reason }, _) => Err(Error::Unsupported(reason)),
            (other, _) => Err(self.unexpected("done", &other)),
        }
    }

    /// An answer of the wrong kind.
    pub fn unexpected(&self, expected: &str, got: &Reply) -> Error {
        Error::Engine(format!("{}: expected {expected}, got {got:?}", self.hello.engine))
    }

    /// The engine's process, where it has one.
    pub fn process(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// The most memory that the process ever had resident, where the system tells.
    pub fn peak_resident_bytes(&self) -> Option<f64> {
        let status = Path::new("/proc").join(self.process()?.to_string()).join("status");
        let status = std::fs::read_to_string(status).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()? * 1024.0)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The end of its input ends an engine.
        self.writer = None;
        if let Some(child) = &mut self.child {
            let patience = Instant::now() + Duration::from_secs(10);
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < patience {
                std::thread::sleep(Duration::from_millis(10));
            }
            if matches!(child.try_wait(), Ok(None)) {
                let _ = child.kill();
            }
            let _ = child.wait();
        }
    }
}
