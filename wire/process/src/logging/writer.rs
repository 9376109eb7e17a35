//! The thread that writes the log, the only one that waits for where the log goes.

use std::{
    fmt,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::write,
};
use tracing_subscriber::fmt::{
    format::Writer as FormatWriter,
    time::{FormatTime, SystemTime},
};

use super::{LogFormat, file::LogFile, queue::Queue, rate_limit};

/// Minimum time between two lines about dropped lines, and between two looks at limited events.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Text of the event that reports dropped lines.
const DROPPED_EVENT: &str = "log lines were dropped";
/// Target of that event.
const TARGET: &str = module_path!();

/// Where the log goes: standard error, a file, or both.
#[derive(Debug)]
pub(super) struct Sinks<S> {
    stream: Option<Stream<S>>,
    file: Option<LogFile>,
}

impl<S: AsFd> Sinks<S> {
    pub(super) fn new(stream: Option<S>, file: Option<LogFile>) -> Self {
        let stream = stream.map(|fd| Stream { fd, torn: false });
        Self { stream, file }
    }

    /// Writes a line; whether all of it was written everywhere.
    fn write(&mut self, line: &[u8]) -> bool {
        let to_stream = self.stream.as_mut().is_none_or(|stream| stream.write(line));
        let to_file = self.file.as_mut().is_none_or(|file| file.write(line));
        to_stream && to_file
    }
}

/// Writes the lines of a queue to where the log goes.
#[derive(Debug)]
pub(super) struct Writer<S> {
    queue: &'static Queue,
    sinks: Sinks<S>,
    format: LogFormat,
    /// Number of dropped lines that a line has reported.
    reported: u64,
    last_report: Option<Instant>,
    /// The last look at limited events.
    last_look: Option<Instant>,
}

impl<S: AsFd> Writer<S> {
    pub(super) fn new(queue: &'static Queue, sinks: Sinks<S>, format: LogFormat) -> Self {
        Self { queue, sinks, format, reported: 0, last_report: None, last_look: None }
    }

    /// Writes for as long as the process lives.
    pub(super) fn run(mut self) -> ! {
        loop {
            self.step(rate_limit::LIMITS.has_unreported());
        }
    }

    /// Writes the next line, or the reports that are due. With `watching`, waits no longer than for
    /// the next look at limited events.
    fn step(&mut self, watching: bool) {
        let is_reported = self.queue.dropped() == self.reported;
        let limit = (watching || !is_reported).then_some(REPORT_INTERVAL);
        if let Some(line) = self.queue.next(limit)
            && !self.sinks.write(&line)
        {
            self.queue.count_dropped();
        }
        let now = Instant::now();
        self.report_dropped(now);
        if !is_early(self.last_look, now) {
            self.last_look = Some(now);
            rate_limit::LIMITS.report_due(now);
        }
    }

    /// Reports the lines that were dropped since the last report. If that line cannot be written
    /// either, the next one has their number.
    fn report_dropped(&mut self, now: Instant) {
        let dropped = self.queue.dropped();
        if dropped == self.reported || is_early(self.last_report, now) {
            return;
        }
        self.last_report = Some(now);
        let line = dropped_line(self.format, dropped - self.reported);
        if self.sinks.write(line.as_bytes()) {
            self.reported = dropped;
        }
    }
}

/// Whether less than the interval has passed since the last time.
fn is_early(last: Option<Instant>, now: Instant) -> bool {
    last.is_some_and(|last| now.saturating_duration_since(last) < REPORT_INTERVAL)
}

/// The line about dropped lines. It does not go through the queue, which may be full.
fn dropped_line(format: LogFormat, dropped: u64) -> String {
    let mut time = String::new();
    // Writing to a String cannot fail.
    let _: fmt::Result = SystemTime.format_time(&mut FormatWriter::new(&mut time));
    match format {
        LogFormat::Text => format!("{time}  WARN {TARGET}: {DROPPED_EVENT} dropped={dropped}\n"),
        LogFormat::Json => format!(
            "{{\"timestamp\":\"{time}\",\"level\":\"WARN\",\"message\":\"{DROPPED_EVENT}\",\
             \"dropped\":{dropped},\"target\":\"{TARGET}\"}}\n"
        ),
    }
}

/// A file, pipe or terminal that may be full, slow or gone.
#[derive(Debug)]
struct Stream<S> {
    fd: S,
    /// Whether a line was cut, so that the next must begin on a line of its own.
    torn: bool,
}

impl<S: AsFd> Stream<S> {
    /// Writes a line; whether all of it was written. Waits while the sink is full.
    fn write(&mut self, line: &[u8]) -> bool {
        if self.torn && self.write_all(b"\n").is_err() {
            return false;
        }
        self.torn = false;
        match self.write_all(line) {
            Ok(()) => true,
            Err(written) => {
                self.torn = written > 0;
                false
            }
        }
    }

    /// Writes all bytes.
    ///
    /// # Errors
    /// With the number of bytes that were written before the sink failed: its reader is gone, or
    /// the disk is full.
    fn write_all(&self, bytes: &[u8]) -> Result<(), usize> {
        let mut written = 0;
        while written < bytes.len() {
            match write(&self.fd, &bytes[written..]) {
                Ok(0) => return Err(written),
                Ok(count) => written += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait_for_room(),
                Err(_) => return Err(written),
            }
        }
        Ok(())
    }

    /// Waits until a sink in non-blocking mode has room, or has failed.
    fn wait_for_room(&self) {
        let mut watched = [PollFd::new(self.fd.as_fd(), PollFlags::POLLOUT)];
        // An interrupted wait ends in another attempt to write.
        let _ = poll(&mut watched, PollTimeout::NONE);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{PipeReader, PipeWriter, Read as _, pipe},
    };

    use socket2::SockRef;

    use super::{super::file::LogFileConfig, *};

    fn queue() -> &'static Queue {
        Box::leak(Box::new(Queue::new()))
    }

    fn piped() -> (PipeReader, Writer<PipeWriter>) {
        let (reader, writer) = pipe().unwrap();
        (reader, to_stream(writer))
    }

    fn to_stream<S: AsFd>(stream: S) -> Writer<S> {
        Writer::new(queue(), Sinks::new(Some(stream), None), LogFormat::Text)
    }

    /// What the writer wrote. It must have ended.
    fn read(mut reader: PipeReader) -> String {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn dropped_lines_are_reported_in_one_line_once_the_sink_works() {
        let (reader, mut writer) = piped();
        for _ in 0..3 {
            writer.queue.count_dropped();
        }
        for text in ["first\n", "second\n"] {
            writer.queue.push(text.into());
            writer.step(false);
        }
        drop(writer);
        let text = read(reader);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!((lines.len(), lines[0], lines[2]), (3, "first", "second"), "{text}");
        assert!(
            lines[1].ends_with(
                " WARN culvert_process::logging::writer: log lines were dropped dropped=3"
            )
        );
    }

    #[test]
    fn the_report_in_json_has_the_fields_of_every_line() {
        let line = dropped_line(LogFormat::Json, 7);
        assert!(line.starts_with("{\"timestamp\":\"20"), "{line}");
        let rest = "Z\",\"level\":\"WARN\",\"message\":\"log lines were dropped\",\"dropped\":7,\
                    \"target\":\"culvert_process::logging::writer\"}\n";
        assert!(line.ends_with(rest), "{line}");
    }

    #[test]
    fn a_sink_that_fails_costs_its_lines_alone() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let broken = to_stream(writer.into());
        let full = File::options().write(true).open("/dev/full").unwrap();
        let full = to_stream(full.into());
        for mut writer in [broken, full] as [Writer<std::os::fd::OwnedFd>; 2] {
            for _ in 0..5 {
                writer.queue.push(b"lost\n".to_vec());
                writer.step(false);
            }
            assert_eq!(writer.queue.dropped(), 5);
        }
    }

    #[test]
    fn a_sink_in_non_blocking_mode_that_is_full_for_a_while_loses_nothing() {
        const LINES: usize = 5_000; // far more than a pipe holds
        let (reader, mut writer) = piped();
        SockRef::from(&writer.sinks.stream.as_ref().unwrap().fd).set_nonblocking(true).unwrap();
        let queue = writer.queue;
        for number in 0..LINES {
            queue.push(format!("{number:040}\n").into_bytes());
        }
        let writing = std::thread::spawn(move || (0..LINES).for_each(|_| writer.step(false)));
        let text = read(reader);
        writing.join().unwrap();
        let numbers: Vec<usize> = text.lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(numbers, Vec::from_iter(0..LINES));
        assert_eq!(queue.dropped(), 0);
    }

    #[test]
    fn the_log_goes_to_a_file_and_to_standard_error_and_what_fails_in_one_is_in_the_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let config = LogFileConfig { path: path.clone(), max_size: 0, also_stderr: true };
        let (reader, stream) = pipe().unwrap();
        let file = LogFile::new(&config).unwrap();
        let sinks = Sinks::new(Some(stream), Some(file));
        let mut writer = Writer::new(queue(), sinks, LogFormat::Text);
        writer.queue.push(b"both\n".to_vec());
        writer.step(false);
        let mut text = [0; 5];
        { &reader }.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"both\n");
        drop(reader);
        writer.queue.push(b"one\n".to_vec());
        writer.step(false);
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.starts_with("both\none\n"), "{text}");
        assert_eq!(writer.queue.dropped(), 1);
    }

    #[test]
    fn a_line_that_was_cut_ends_before_the_next_begins() {
        let (reader, writer) = pipe().unwrap();
        let mut sink = Stream { fd: writer, torn: true };
        assert!(sink.write(b"whole\n") && sink.write(b"next\n"));
        drop(sink);
        assert_eq!(read(reader), "\nwhole\nnext\n");
    }
}
