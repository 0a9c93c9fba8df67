//! `soci index`.

mod info;
mod list;
mod rm;

use crate::app::App;
use crate::cli::Index;

pub(crate) async fn run(app: &App, command: Index) -> anyhow::Result<()> {
    match command {
        Index::List(args) => list::run(app, args).await,
        Index::Info(args) => info::run(app, &args.digest).await,
        Index::Remove(args) => rm::run(app, args).await,
    }
}
