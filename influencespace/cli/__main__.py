from influencespace.cli import main

main()
