//! From the words of the command line to flags, with the liberties of the Go tool: long flags with one dash, values of
//! switches (`--debug=false`), errors in its words.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory as _, FromArgMatches as _};

use crate::cli::Cli;

/// Why there is nothing to run.
#[derive(Debug)]
pub(crate) enum Stop {
    /// Help or version, to be printed.
    Text(String),
    /// A mistake.
    Error(String),
    /// A command that there is not, which the Go tool tells by another exit status.
    NoSuchCommand(String),
}

/// Parses the command line, program name included.
pub(crate) fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Cli, Stop> {
    let mut command = Cli::command();
    command.build();
    let mut switches = HashMap::new();
    collect_flags(&command, &mut switches);
    let mut words: Vec<OsString> = normalize(words.into_iter().collect(), &switches);
    match words.get(1).and_then(|word| word.to_str()) {
        None => return Err(Stop::Text(command.render_help().to_string())),
        Some("h") => words[1] = "help".into(),
        Some(_) => {}
    }
    let usage = usage(&mut command, &words);
    let matches = Cli::command().try_get_matches_from(words).map_err(|error| stop(&error, &usage))?;
    if matches.subcommand().is_none() {
        return Err(Stop::Text(command.render_help().to_string()));
    }
    Cli::from_arg_matches(&matches).map_err(|error| stop(&error, &usage))
}

/// Collects all flags, each with whether it is a switch; short ones by their letter.
fn collect_flags(command: &clap::Command, flags: &mut HashMap<String, bool>) {
    for argument in command.get_arguments() {
        let switch = !argument.get_action().takes_values();
        let names = [argument.get_long().map(str::to_owned), argument.get_short().map(String::from)];
        flags.extend(names.into_iter().flatten().map(|name| (name, switch)));
    }
    for command in command.get_subcommands() {
        collect_flags(command, flags);
    }
}

/// Returns how the command that the words name is used.
fn usage(command: &mut clap::Command, words: &[OsString]) -> String {
    let names: Vec<&str> = words.iter().skip(1).filter_map(|word| word.to_str()).collect();
    match names.iter().position(|name| command.find_subcommand(name).is_some()) {
        Some(at) => match command.find_subcommand_mut(names[at]) {
            Some(found) => usage(found, &words[(at + 1).min(words.len())..]),
            None => String::new(),
        },
        None => command.render_usage().to_string(),
    }
}

/// Flags that are as absent when they are given an empty text, as scripts do with a variable that is not set.
const MAY_BE_EMPTY: [&str; 9] = [
    "ref",
    "image-ref",
    "ztoc-digest",
    "prefetch-files-json",
    "output",
    "hosts-dir",
    "tlscacert",
    "tlscert",
    "tlskey",
];

/// Rewrites `-long` to `--long`, `--switch=true` to `--switch`, and drops `--switch=false` and flags that may be empty
/// and are.
fn normalize(words: Vec<OsString>, flags: &HashMap<String, bool>) -> Vec<OsString> {
    let mut result = Vec::with_capacity(words.len());
    let mut words = words.into_iter();
    result.extend(words.next());
    let mut is_value = false;
    while let Some(word) = words.next() {
        if std::mem::take(&mut is_value) {
            result.push(word);
            continue;
        }
        if word == "--" {
            result.push(word);
            result.extend(words);
            break;
        }
        let Some((name, value)) = long(&word, flags) else {
            let short = word.to_str().and_then(|word| word.strip_prefix('-'));
            is_value = short.is_some_and(|name| flags.get(name) == Some(&false));
            result.push(word);
            continue;
        };
        let switch = flags.get(name).copied().unwrap_or(false);
        if MAY_BE_EMPTY.contains(&name) {
            let next = words.as_slice().first();
            match (value, next.map(OsString::as_os_str)) {
                (Some(value), _) if value.is_empty() => continue,
                (None, Some(next)) if next.is_empty() => {
                    words.next();
                    continue;
                }
                _ => {}
            }
        }
        match (switch, value.and_then(OsStr::to_str)) {
            (true, Some("1" | "t" | "T" | "true" | "TRUE" | "True")) => result.push(spell(name)),
            (true, Some("0" | "f" | "F" | "false" | "FALSE" | "False")) => {}
            _ => {
                is_value = !switch && value.is_none();
                let mut flag = spell(name);
                if let Some(value) = value {
                    flag.push("=");
                    flag.push(value);
                }
                result.push(flag);
            }
        }
    }
    result
}

/// Writes a flag as clap expects it.
fn spell(name: &str) -> OsString {
    let dashes = if name.len() == 1 { "-" } else { "--" };
    format!("{dashes}{name}").into()
}

/// Returns name and value of a long flag that is known, with one dash or two, and of a short switch with a value.
fn long<'a>(word: &'a OsStr, flags: &HashMap<String, bool>) -> Option<(&'a str, Option<&'a OsStr>)> {
    use std::os::unix::ffi::OsStrExt as _;
    let bytes = word.as_bytes();
    let rest = bytes.strip_prefix(b"--").or_else(|| bytes.strip_prefix(b"-"))?;
    let equals = rest.iter().position(|byte| *byte == b'=');
    let name = std::str::from_utf8(&rest[..equals.unwrap_or(rest.len())]).ok()?;
    // One letter is a short flag, which clap knows, but for `-q=true`.
    if !flags.contains_key(name) || (name.len() < 2 && (equals.is_none() || !flags[name])) {
        return None;
    }
    Some((name, equals.map(|at| OsStr::from_bytes(&rest[at + 1..]))))
}

fn stop(error: &clap::Error, usage: &str) -> Stop {
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp
            | ErrorKind::DisplayVersion
            | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    ) {
        return Stop::Text(error.render().to_string());
    }
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    let rendered = error.render().to_string();
    let source = std::error::Error::source(error).map(ToString::to_string);
    let message = match (error.kind(), text(ContextKind::InvalidArg), text(ContextKind::InvalidValue)) {
        (ErrorKind::InvalidValue | ErrorKind::ValueValidation, Some(flag), Some(value))
            if flag.starts_with("--") =>
        {
            let name = flag.trim_start_matches('-').split([' ', '=']).next().unwrap_or_default().to_owned();
            let reason = source.unwrap_or_else(|| "not accepted".to_owned());
            format!("invalid value {value:?} for flag -{name}: {reason}")
        }
        (ErrorKind::UnknownArgument, Some(flag), _) if flag.starts_with('-') => {
            format!("flag provided but not defined: -{}", flag.trim_start_matches('-'))
        }
        (ErrorKind::UnknownArgument, Some(_), _) => "more arguments than expected".to_owned(),
        (ErrorKind::InvalidSubcommand, ..) => {
            format!("no such command: {}", text(ContextKind::InvalidSubcommand).unwrap_or_default())
        }
        _ => rendered.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned(),
    };
    let message = if usage.is_empty() { message } else { format!("{message}\n\n{usage}") };
    match error.kind() {
        ErrorKind::InvalidSubcommand => Stop::NoSuchCommand(message),
        _ => Stop::Error(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Command;

    fn parse(words: &str) -> Result<Cli, Stop> {
        super::parse(std::iter::once("soci").chain(words.split_whitespace()).map(OsString::from))
    }

    fn error(words: &str) -> String {
        match parse(words) {
            Err(Stop::Error(message) | Stop::NoSuchCommand(message)) => message,
            Err(Stop::Text(text)) => panic!("{text}"),
            Ok(_) => panic!("{words} is accepted"),
        }
    }

    #[test]
    fn long_flags_may_have_one_dash_and_globals_may_come_anywhere() {
        for words in [
            "--address /x -n k8s.io create --all-platforms --span-size=65536 image",
            "create -all-platforms -span-size 65536 image --address /x --namespace=k8s.io",
            "-address /x create -all-platforms=true -span-size=65536 -namespace k8s.io image",
        ] {
            let cli = parse(words).unwrap_or_else(|_| panic!("{words}"));
            assert_eq!((cli.global.address.as_str(), cli.global.namespace.as_str()), ("/x", "k8s.io"));
            let Some(Command::Create(create)) = cli.command else { panic!("{words}") };
            assert!(create.platforms.all_platforms);
            assert_eq!((create.ztoc.span_size, create.image.as_deref()), (65536, Some("image")));
        }
        let Ok(Cli { global, .. }) = parse("rebuild-db --debug=false") else { panic!() };
        assert!(!global.debug);
    }

    #[test]
    fn values_are_not_taken_for_flags() {
        let Ok(Cli { command: Some(Command::Push(push)), .. }) = parse("push -u -quiet -q image") else {
            panic!()
        };
        assert!(push.quiet);
        assert_eq!(push.registry.user, Some("-quiet".into()));
    }

    #[test]
    fn lists_are_split_at_commas() {
        let words = "create --prefetch-file /a,/b --prefetch-file /c -p linux/amd64,linux/arm64 image";
        let Ok(Cli { command: Some(Command::Create(create)), .. }) = parse(words) else { panic!() };
        assert_eq!(create.ztoc.prefetch_file, ["/a", "/b", "/c"]);
        assert_eq!(create.platforms.platform.len(), 2);
    }

    #[test]
    fn scripts_liberties_are_taken_as_by_the_go_tool() {
        // The last of a repeated flag counts, also across the command's name.
        let Ok(Cli { global, .. }) = parse("-n one --root /a rebuild-db --root /b -n two") else { panic!() };
        assert_eq!((global.namespace.as_str(), global.root.to_str()), ("two", Some("/b")));
        let Ok(Cli { global, .. }) = parse("--namespace= --address= rebuild-db") else { panic!() };
        assert_eq!((global.namespace.as_str(), global.address.as_str()), ("default", crate::cli::ADDRESS));
        // Short switches have values too.
        let Ok(Cli { command: Some(Command::Push(push)), .. }) = parse("push -q=true -k=false image") else {
            panic!()
        };
        assert!(push.quiet && !push.registry.skip_verify);
        // What is empty is not given.
        let words = ["soci", "push", "--hosts-dir", "", "--tlscacert=", "--tlscert", "", "image"];
        let Ok(Cli { command: Some(Command::Push(push)), .. }) = super::parse(words.map(OsString::from))
        else {
            panic!()
        };
        assert!(push.registry.hosts_dir.is_empty() && push.registry.tlscacert.is_none());
        assert!(push.registry.tlscert.is_none() && push.image.as_deref() == Some("image"));
        let words = ["soci", "ztoc", "ls", "--ztoc-digest", "", "-image-ref", ""];
        assert!(super::parse(words.map(OsString::from)).is_ok());
        // Numbers are Go's.
        for (text, expected) in [("0x100000", 1 << 20), ("1_000", 1000), ("0b11", 3)] {
            let Ok(Cli { command: Some(Command::Create(create)), .. }) =
                parse(&format!("create --span-size {text} image"))
            else {
                panic!("{text}")
            };
            assert_eq!(create.ztoc.span_size, expected);
        }
        assert!(matches!(parse("--debug"), Err(Stop::Text(text)) if text.contains("rebuild-db")));
    }

    #[test]
    fn what_nerdctl_passes_is_accepted() {
        let words = "--address a --namespace n create --all-platforms --platform linux/amd64 --span-size 4 \
                     --min-layer-size 5 image";
        assert!(parse(words).is_ok());
        let words = "--address a --namespace n push --all-platforms --platform linux/amd64 --skip-verify \
                     --plain-http --hosts-dir /a,/b image";
        assert!(parse(words).is_ok());
        assert!(
            parse("push --refresh token --http-dump --http-trace --snapshotter soci --tlscacert /x image")
                .is_ok()
        );
    }

    #[test]
    fn mistakes_are_said_in_the_tools_words() {
        let message = error("create --span-size x image");
        assert!(message.starts_with("invalid value \"x\" for flag -span-size: "), "{message}");
        assert!(message.contains("\n\nUsage: soci create"), "{message}");
        assert!(error("create -p nonsense/a/b/c image").contains("could not parse platform nonsense/a/b/c"));
        assert!(error("create image extra").starts_with("more arguments than expected\n"));
        assert!(
            error("push --max-concurrent-uploads -1 image").starts_with("invalid value \"-1\" for flag -max")
        );
        assert!(error("--timeout -5s rebuild-db").starts_with("invalid value \"-5s\" for flag -timeout"));
        assert!(error("create --nope").starts_with("flag provided but not defined: -nope"));
        for words in ["nope", "index nope", "help nope"] {
            let stop = parse(words);
            assert!(
                matches!(&stop, Err(Stop::NoSuchCommand(text)) if text.starts_with("no such command: nope")),
                "{words}"
            );
        }
        let message = error("convert --format zip a b");
        assert!(
            message.contains("unsupported output format \"zip\": must be \"oci-archive\" or \"oci-dir\"")
        );
        assert!(matches!(parse("--version"), Err(Stop::Text(text)) if text.starts_with("soci version ")));
        assert!(matches!(parse("h"), Err(Stop::Text(text)) if text.contains("rebuild-db")));
        assert!(matches!(parse(""), Err(Stop::Text(_))));
    }

    #[test]
    fn t123_a_mistake_never_shows_the_password() {
        for words in ["push --user robot:hunter2 --nope image", "push --user robot:hunter2 a b"] {
            assert!(!error(words).contains("hunter2"), "{words}");
        }
    }
}
